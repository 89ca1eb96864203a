"""`fcmae finetune`: train on labelled images."""

CONFIG = "finetune.config:FinetuneConfig"
RUN = "finetune.train:finetune"
