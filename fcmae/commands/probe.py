"""`fcmae probe`: evaluate frozen features."""

from dataclasses import dataclass

from fcmae.config.fields import IMAGES, ImageSizeConfig, LabelsConfig, SourceConfig, setting


@dataclass
class ProbeConfig(LabelsConfig, ImageSizeConfig, SourceConfig):
    """Evaluate frozen features by nearest neighbours and a linear classifier."""

    data: str = setting(path="a folder with train/CLASS and val/CLASS, or one folder of classes")
    """Labelled images: a folder with train/CLASS and val/CLASS, or one folder of classes together
    with val_fraction. The classifiers are trained on train and evaluated on val."""

    val_fraction: float = setting(0.0, at_least=0, below=1, example="0.2")
    """Fraction of a single folder of classes held out for evaluation, chosen by a hash of the path.
    0 expects folders train and val."""

    json: bool = False
    """Print only one JSON object, with top1 in percent."""

    neighbours: list[int] = setting([5, 20], at_least=1)
    """Numbers of nearest neighbours that vote, such as '[5,20]'; each gives a result."""

    baseline: bool = False
    """Also evaluate random weights of the same architecture, and histograms of colours and
    gradients, which pretraining must beat. Needs scikit-image."""

    curve: bool = False
    """Also measure the linear classifier with 1, 2, 5, 10, … labels per class, and forecast what
    twice and four times the labels would bring."""

    out: str | None = None
    """Figure of the curve to write, .png or .svg. null writes none."""

    near_duplicates: str | None = setting(None, path=IMAGES)
    """Folder of images, such as the unlabelled ones of pretraining, to search for near-duplicates
    of val, which would inflate the result. null disables the search."""

    other_classes: bool = False
    """Allow weights that were fine-tuned for classes other than those of data."""


CONFIG = ProbeConfig
RUN = "fcmae.inspect.probing:probe"
