"""FCMAE: masks, decoder, loss and the autoencoder."""
