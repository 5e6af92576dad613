"""Commands on a Ray cluster: submitted, or written as manifests for one to come."""
