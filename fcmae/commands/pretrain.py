"""`fcmae pretrain`: learn from unlabelled images."""

CONFIG = "fcmae.config.pretraining:PretrainConfig"
RUN = "fcmae.train.pretraining:pretrain"
