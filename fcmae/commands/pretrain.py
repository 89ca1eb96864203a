"""`fcmae pretrain`: learn from unlabeled images."""

from fcmae.config.pretraining import PretrainConfig

CONFIG = PretrainConfig
RUN = "fcmae.train.pretraining:pretrain"
