"""`maskalign plan`: estimate a run, print and write the result. A run that does not fit in memory gives status 1."""

from maskalign.errors import RunError, UsageError
from maskalign.planning.devices import load_device
from maskalign.planning.options import Options, check_ranks
from maskalign.runtime.outputs import make_folder


def plan(config, *, device="h100", out=None, **options):
    """Print the plan of a run and, with `out`, write plan.txt, plan.csv and plan.png there.

    Args:
        config: `Config`.
        device: name or file, see `devices.load_device`.
        out: Path of a folder, or None.
        options: the other attributes of `options.Options`.

    Raises:
        UsageError: see `estimate.plan_run`.
        RunError: the run does not fit in the memory of the device. It is raised after everything is printed.
    """
    device = load_device(device)
    chosen = Options(device=device, **options)
    check_ranks(config, chosen)
    out = None if out is None else make_folder(out)
    from maskalign.planning.estimate import plan_run
    from maskalign.planning.report import draw, text, write_csv

    estimate = plan_run(config, chosen)
    print(text(estimate))
    if out is not None:
        try:
            (out / "plan.txt").write_text(text(estimate) + "\n")
            write_csv(estimate, out / "plan.csv")
            draw(estimate, out / "plan.png")
        except OSError as error:
            raise UsageError(f"--out: {out} cannot be written to ({error.strerror})") from None
        print(f"\n{out}/plan.csv, plan.png, plan.txt")
    if not estimate.fits:
        need, limit = estimate.asked["memory_gib"], chosen.limit / 2**30
        hint = (
            f"at most {estimate.largest} images per micro-batch fit: lower training.batch_size, raise "
            "training.accumulation, or set parallel.recompute"
            if estimate.largest
            else "not even one image fits: set parallel.plan fsdp or parallel.recompute block"
        )
        raise RunError(
            f"the run does not fit: {need:.1f} GiB on a {device.name} of which {limit:.1f} are usable; {hint}"
        )
