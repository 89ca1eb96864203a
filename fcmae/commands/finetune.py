"""`fcmae finetune`: train on labelled images."""

from typing import Any

USAGE = "fcmae finetune DIR --weights DIR|RUN|none --out RUN"


def __getattr__(name: str) -> Any:
    if name != "CONFIG":
        raise AttributeError(name)
    from finetune.config import FinetuneConfig  # the package above this one: only on demand

    return FinetuneConfig


def run(config: Any) -> object:
    from finetune.train import finetune

    return finetune(config)
