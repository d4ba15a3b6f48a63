"""Learning rates by recipe: the search, and the file of chosen rates that later suites read."""

import csv

from maskalign.errors import UsageError

COLUMNS = ("recipe", "lr", "frechet_cnn", "kernel_cnn", "chosen")
MEASURE = "frechet_cnn"  # the rate with the lowest distance of samples at the end of a run is chosen


def searched(recipes, rates):
    """dict name@rate -> settings: every recipe with every rate.

    Args:
        recipes: dict name -> settings.
        rates: numbers, as text.
    """
    return {
        f"{name}@{rate}": {**settings, "optimizer.lr": rate} for name, settings in recipes.items() for rate in rates
    }


def choice(rows):
    """Rows of the file from the CSV rows of a search: one per recipe and rate, where the best of a recipe is marked.

    Only measurements at the end of a run are used. Recipes with unfinished runs are not included.
    """
    ends, found = {}, []
    for row in rows:
        if row["step"] == row["run_steps"] and row["time"] == "" and row["metric"] in COLUMNS:
            ends.setdefault(row["recipe"], {})[row["metric"]] = row["value"]
    by_recipe = {}
    for name, values in ends.items():
        recipe, _, rate = name.rpartition("@")
        by_recipe.setdefault(recipe, []).append({"recipe": recipe, "lr": rate, **values})
    for entries in by_recipe.values():
        best = min(entries, key=lambda entry: entry[MEASURE])
        found += [{**entry, "chosen": int(entry is best)} for entry in entries]
    return found


def write_rates(found, path):
    """Write the file that `read_rates` reads."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for entry in found:
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in entry.items()})


def read_rates(path):
    """dict recipe -> the chosen rate, as text."""
    if not path.is_file():
        return {}
    with open(path, newline="") as file:
        return {row["recipe"]: row["lr"] for row in csv.DictReader(file) if row["chosen"] == "1"}


def with_rates(recipes, how, path, given):
    """The recipes with the learning rates of a suite.

    Args:
        recipes: dict name -> settings.
        how: `chosen` for each recipe's own rate, or the name of a recipe whose rate is used for all.
        path: the file of a search.
        given: dict recipe -> rate, which overrides the file.

    Raises:
        UsageError: a rate is neither given nor in the file.
    """
    known, out = {**read_rates(path), **given}, {}
    for name, settings in recipes.items():
        if "optimizer.lr" in settings:  # from --set, or the recipe's own
            out[name] = settings
            continue
        of = name if how == "chosen" or name in given else how
        if of not in known:
            raise UsageError(
                f"there is no learning rate for {of} in {path}; run --suite rates first, or give --rate {of}=0.004"
            )
        out[name] = {**settings, "optimizer.lr": known[of]}
    return out
