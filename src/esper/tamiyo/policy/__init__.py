"""The learned policy: masks, masked distribution, observation, network."""
