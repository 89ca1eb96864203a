"""`fcmae report`: write an HTML page about runs."""

from dataclasses import dataclass

from fcmae.config.fields import Config, setting


@dataclass
class ReportConfig(Config):
    """Write one static HTML page about one or more runs, side by side."""

    runs: str | list[str] = setting(path="the folder of a run", positional=True)
    """Run folder of pretraining or fine-tuning; several as A B or '[A,B]'."""

    out: str | None = None
    """Page to write, .html. null writes report.html to the folder of the first run."""


CONFIG = ReportConfig
RUN = "fcmae.inspect.reporting:report"
