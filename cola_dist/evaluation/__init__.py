"""What trained models can do: probes of the codes and rollouts of the generator."""
