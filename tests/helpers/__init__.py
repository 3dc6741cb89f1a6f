"""What several tests share: small models, planted streams, tiny suites."""
