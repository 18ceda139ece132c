"""Merges dense models into a mixture of experts: recipe, router, forward pass, merged model, and its checkpoint."""
