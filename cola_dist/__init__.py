"""Co-training of a latent action model and a pretrained video world model, distributed with Ray and DeepSpeed."""
