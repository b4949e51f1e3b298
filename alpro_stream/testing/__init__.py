"""What tests and demonstrations need: small shard sets, tiny configurations, process groups on one machine."""
