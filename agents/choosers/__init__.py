"""Plan choosers: which plan each round uses."""
