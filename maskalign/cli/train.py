"""`maskalign train`: its settings are the tree in maskalign/config/settings.py."""

DESCRIPTION = """Train a model, or resume the run in run_dir.

Settings come from a YAML file or a packaged recipe, and from options such as
--training.max_steps 1000, which override it in any order. For several GPUs or
nodes: torchrun ... -m maskalign train ..."""
SETTINGS = None  # the tree of settings
EPILOG = """examples:
  maskalign train --config quickstart
  maskalign train --config pixels64 --data.path datasets/photos64 --run_dir runs/photos
  maskalign train --config imagenet256/b2/maskalign --training.batch_size 512
  torchrun --nproc_per_node 8 -m maskalign train --config imagenet256/xl2/maskalign --parallel.plan fsdp"""
USAGE = "[--config FILE.yaml|RECIPE] [--section.key VALUE ...]"


def run(argv, start):
    from maskalign.config import parse_config

    name = "maskalign train"
    config = parse_config(argv, prog=name, usage=f"{name} {USAGE}", description=DESCRIPTION, epilog=EPILOG)
    # The data set is looked at before torch is imported: most mistakes are found within a second.
    from maskalign.training.preflight import check_data

    manifest, facts = check_data(config)
    start()
    from maskalign.training.trainer import train

    train(config, manifest, facts)
