if __name__ != "medclip_lab.losses":
    raise ImportError("import medclip_lab.losses, not losses")
