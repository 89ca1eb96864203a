"""`fcmae pretrain`: learn from unlabelled images."""

from fcmae.config.pretraining import PretrainConfig

CONFIG = PretrainConfig
RUN = "fcmae.train.pretraining:pretrain"
