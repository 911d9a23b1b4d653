"""The container of the cloud half: what it is made of, how it is built and tried."""
