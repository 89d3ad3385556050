"""Names of the application and of its deployments, as Ray Serve knows them."""

APP_NAME = "valle"
AR, NAR, CODEC = "AR", "NAR", "Codec"
