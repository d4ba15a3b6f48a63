"""The recipes, installed with the package: `maskalign train --config imagenet256/b2/maskalign` finds them by name."""
