"""`fcmae pretrain`: learn from unlabeled images."""

from fcmae.config.pretraining import PretrainConfig

CONFIG = PretrainConfig
USAGE = "fcmae pretrain IMAGES... --out RUN"


def run(config: PretrainConfig) -> object:
    from fcmae.train.pretraining import pretrain

    return pretrain(config)
