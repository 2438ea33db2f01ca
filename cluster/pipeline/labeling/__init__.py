"""People's rankings: the page, as a command and in rounds; sheets; what comes first. It may import what stages may."""
