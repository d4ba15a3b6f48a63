/* Gradient norm, and AdamW with the moving average and a bfloat16 copy, over all tensors of a model in one call each.
   Built and called by fused_update.py. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 16384 }; /* elements; tensors are cut into blocks, which are divided among the threads */

typedef struct {
    float *master, *first, *second, *average;
    const void *grad; /* bfloat16, or float32 if `is_float` */
    uint16_t *copy;   /* bfloat16, or NULL */
    int64_t size, is_float;
    float rate;       /* learning rate / (1 - beta1^step) */
    float correction; /* 1 / sqrt(1 - beta2^step) */
} Tensor;

typedef struct {
    float beta1, beta2, eps;
    float shrink; /* 1 - learning rate * weight decay */
    float scale;  /* factor of the gradients, from clipping */
    float pull;   /* 1 - decay of the average */
} Numbers;

static inline float bfloat16_to_float(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Round to nearest, ties to even; NaN stays NaN. */
static inline uint16_t float_to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value == value ? (uint16_t)rounded : 0x7fc0;
}

static int64_t block_count(const Tensor *tensor) { return (tensor->size + BLOCK - 1) / BLOCK; }

static int64_t block_end(const Tensor *tensor, int64_t block) {
    int64_t end = (block + 1) * BLOCK;
    return end < tensor->size ? end : tensor->size;
}

/* Divides all blocks of all tensors equally among the threads; each thread visits its own blocks. */
typedef void (*Visit)(const Tensor *tensor, int64_t begin, int64_t end, int64_t before, const void *context);

static void share_blocks(const Tensor *tensors, int64_t count, int threads, Visit visit, const void *context) {
    int64_t total = 0;
    for (int64_t k = 0; k < count; k++) total += block_count(tensors + k);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t thread = 0; thread < threads; thread++) {
        int64_t low = total * thread / threads, high = total * (thread + 1) / threads, before = 0;
        for (int64_t k = 0; k < count && before < high; k++) {
            int64_t own = block_count(tensors + k);
            int64_t begin = low > before ? low - before : 0, end = high - before < own ? high - before : own;
            if (begin < end) visit(tensors + k, begin, end, before, context);
            before += own;
        }
    }
}

static inline float float_to_float(float value) { return value; }

/* One loop for each dtype of gradients, with and without a copy, so that the compiler sees code without branches. */
#define UPDATE_SPAN(name, kind, load, store)                                                                           \
    static void name(const Tensor *tensor, int64_t begin, int64_t end, const Numbers *numbers) {                       \
        float *restrict master = tensor->master, *restrict first = tensor->first, *restrict second = tensor->second;   \
        float *restrict average = tensor->average;                                                                     \
        const kind *restrict grad = tensor->grad;                                                                      \
        uint16_t *restrict copy = tensor->copy;                                                                        \
        const float beta1 = numbers->beta1, beta2 = numbers->beta2, eps = numbers->eps, shrink = numbers->shrink;      \
        const float scale = numbers->scale, pull = numbers->pull, rate = tensor->rate;                                 \
        const float correction = tensor->correction;                                                                   \
        (void)copy;                                                                                                    \
        _Pragma("omp simd") for (int64_t i = begin; i < end; i++) {                                                    \
            float g = load(grad[i]) * scale;                                                                           \
            float m = first[i] + (1 - beta1) * (g - first[i]);                                                         \
            float v = beta2 * second[i] + (1 - beta2) * g * g;                                                         \
            float p = master[i] * shrink - rate * m / (sqrtf(v) * correction + eps);                                   \
            first[i] = m;                                                                                              \
            second[i] = v;                                                                                             \
            master[i] = p;                                                                                             \
            average[i] += pull * (p - average[i]);                                                                     \
            store;                                                                                                     \
        }                                                                                                              \
    }
UPDATE_SPAN(update_bfloat16_with_copy, uint16_t, bfloat16_to_float, copy[i] = float_to_bfloat16(p))
UPDATE_SPAN(update_bfloat16, uint16_t, bfloat16_to_float, )
UPDATE_SPAN(update_float_with_copy, float, float_to_float, copy[i] = float_to_bfloat16(p))
UPDATE_SPAN(update_float, float, float_to_float, )

static void update_blocks(const Tensor *tensor, int64_t begin, int64_t end, int64_t before, const void *numbers) {
    int64_t first = begin * BLOCK, last = block_end(tensor, end - 1);
    (void)before;
    if (tensor->is_float)
        (tensor->copy ? update_float_with_copy : update_float)(tensor, first, last, numbers);
    else
        (tensor->copy ? update_bfloat16_with_copy : update_bfloat16)(tensor, first, last, numbers);
}

void update(const Tensor *tensors, int64_t count, const Numbers *numbers, int threads) {
    share_blocks(tensors, count, threads, update_blocks, numbers);
}

#define SQUARE_SUM(name, kind, load)                                                                                   \
    static float name(const kind *grad, int64_t count) {                                                               \
        float sums[16] = {0}, sum = 0;                                                                                 \
        int64_t i = 0;                                                                                                 \
        for (; i + 16 <= count; i += 16)                                                                               \
            for (int lane = 0; lane < 16; lane++) {                                                                    \
                float g = load(grad[i + lane]);                                                                        \
                sums[lane] += g * g;                                                                                   \
            }                                                                                                          \
        for (; i < count; i++) sum += load(grad[i]) * load(grad[i]);                                                   \
        for (int lane = 0; lane < 16; lane++) sum += sums[lane];                                                       \
        return sum;                                                                                                    \
    }
SQUARE_SUM(squares_of_bfloat16, uint16_t, bfloat16_to_float)
SQUARE_SUM(squares_of_float, float, float_to_float)

static void square_blocks(const Tensor *tensor, int64_t begin, int64_t end, int64_t before, const void *out) {
    for (int64_t block = begin; block < end; block++) {
        int64_t first = block * BLOCK, count = block_end(tensor, block) - first;
        ((float *const *)out)[0][before + block] = tensor->is_float
                                                       ? squares_of_float((const float *)tensor->grad + first, count)
                                                       : squares_of_bfloat16((const uint16_t *)tensor->grad + first,
                                                                             count);
    }
}

/* Sum of squares of every block of every gradient, into `out`: the same with any number of threads. */
void square_sums(const Tensor *tensors, int64_t count, float *out, int threads) {
    share_blocks(tensors, count, threads, square_blocks, &out);
}
