"""Run folders: schema, tables, sums, manifest."""
