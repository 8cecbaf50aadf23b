"""Networks: latent action model, action conditioning, flow, and the generators behind one interface. Torch alone."""
