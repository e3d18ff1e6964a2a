"""MLflow's model registry: trained racks as versions of registered models, with where they come from."""
