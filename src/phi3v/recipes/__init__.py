"""The recipes that come with the package: YAML files for ``phi3v train``, and the scripts of Microsoft's recipe."""
