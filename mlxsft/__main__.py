"""`python -m mlxsft` is the command `mlxsft`."""

from mlxsft.cli import run

if __name__ == "__main__":
    run()
