"""`fcmae evaluate`: measure a fine-tuned model."""

from dataclasses import KW_ONLY, dataclass

from fcmae.config.fields import ImageSizeConfig, LabelsConfig, SourceConfig, setting


@dataclass
class EvaluateConfig(LabelsConfig, ImageSizeConfig, SourceConfig):
    """Measure a fine-tuned model on labelled images, overall and for each class or target."""

    source: str
    """Fine-tuning run (its best weights) or folder of weights."""

    data: str = setting(path="a folder of labelled images or a CSV file of labels")
    """Labelled images: a folder with one folder per split, one folder of classes, or a CSV file.
    For the data that a run was trained on, its CSV file need not be given again."""

    split: str = "val"
    """Split to evaluate: a folder in data, or a value of the column split."""

    json: bool = False
    """Print only one JSON object, with scores of classes in percent."""

    out: str | None = None
    """Figure to write, .png, or its numbers, .csv: the confusion matrix, the average precision of
    each class, or predicted against true numbers. null writes none."""

    _: KW_ONLY

    img_size: int | list[int] | None = setting(None, multiple=1)


CONFIG = EvaluateConfig
RUN = "finetune.evaluate:evaluate"
