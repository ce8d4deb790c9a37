"""Side-by-side measurements against peers; one command each.  How they measure: docs/guide/bench.md."""
