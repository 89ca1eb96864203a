"""`fcmae push`: publish a model on the Hugging Face Hub."""

from dataclasses import dataclass

from fcmae.config.fields import WEIGHTS, Config, setting


@dataclass
class PushConfig(Config):
    """Upload a pretrained or fine-tuned model, with a model card, to the Hugging Face Hub."""

    source: str = setting(path=WEIGHTS, positional=True)
    """Run (its best weights), folder of weights or weight file."""

    repo: str = setting(positional=True)
    """Name on the Hub, USER/NAME."""

    license: str = setting()
    """The model's licence as the Hub names it, such as mit or apache-2.0. Weights that started from
    an official release keep its licence, cc-by-nc-4.0."""

    data_source: str = ""
    """Where the training images come from, in words, for the model card."""

    public: bool = False
    """Whether everybody can read a new repository."""

    update: bool = False
    """Whether to replace the model in a repository that exists."""


CONFIG = PushConfig
RUN = "finetune.pushing:push"
