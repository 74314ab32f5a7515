"""`python -m sightline.launch_server --model-path MODEL ...`: SGLang's spelling of `sightline serve`."""

import sys

from sightline.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
