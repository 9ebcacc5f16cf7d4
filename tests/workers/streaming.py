"""Several ranks that train on a stream; see ``stream_training``."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from stream_training import train


def main(folder: Path, runs: list[dict]) -> None:
    weights = [train(folder, **run).tolist() for run in runs]
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps({"weights": weights}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
