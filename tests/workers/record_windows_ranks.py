"""Windows of documents and questions over two ranks: what is measured, against one process."""

import json
import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from record_windows import BERT, QUESTIONS, TAGS, WORDS, WORDWISE, answers_data, tokens_data, word_tokenizer

from lightning_llm import LLMModule


def run_alone(task, labels, steps, make):
    """A bare loop, before there are ranks to gather from."""
    torch.manual_seed(0)
    module, data = LLMModule(dict(BERT), task, labels=labels, dtype="float64"), make()
    data.setup("fit")
    module.task.configure(module.config, labels, datamodule=data)
    module.configure_model()
    optimizer = torch.optim.Adam(module.model.parameters(), lr=3e-2)
    for batch, _ in zip(data.train_dataloader(), range(steps), strict=False):
        optimizer.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
    module.eval()
    rows, metrics = data._dataset("validation"), module.task.metrics()
    for first in range(0, len(rows), 4):
        with torch.no_grad():
            module.task.evaluate(module.model, rows[list(range(first, min(first + 4, len(rows))))], metrics)
    return module, {f"val/{key}": value.item() for key, value in metrics.compute().items()}


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options |= {"enable_model_summary": False, "default_root_dir": folder, "num_sanity_val_steps": 0}
    cache = folder / f"cache{rank}"
    wordwise = {"tokenizer": word_tokenizer("[CLS] $A [SEP] $B [SEP]"), **WORDWISE}
    cases = {
        "tokens": ("token-classification", TAGS, 4, lambda: tokens_data(cache, validation_data=WORDS[:7])),
        "answers": (
            "question-answering",
            None,
            6,
            lambda: answers_data(cache, validation_data=QUESTIONS[:7], **wordwise),
        ),
    }
    alone = {name: run_alone(*case) for name, case in cases.items()}
    result = {}
    for name, (_, _, _, make) in cases.items():
        (module, true), data = alone[name], make()
        trainer = L.Trainer(strategy=DDPStrategy(), devices=2, **options)
        found = trainer.validate(module, data, verbose=False)[0]
        mine = {int(example) for batch in data.val_dataloader() for example in batch["example_ids"]} - {-1}
        shares = [None, None]
        torch.distributed.all_gather_object(shares, mine)
        result[name] = {"found": found, "true": true, "torn": sorted(set.intersection(*shares))}
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    torch.distributed.destroy_process_group()  # before the process ends with its threads
