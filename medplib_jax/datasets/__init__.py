"""Programs that make and check datasets: assemble, audit, write_qa, importers."""
