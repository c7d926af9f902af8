"""The methods: one file each, found through `registry`."""
