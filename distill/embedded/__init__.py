def resolve(name):
    return name
