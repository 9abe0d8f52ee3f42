"""The body: row layers, hosts, sites, blueprints, blending, incubation, lifecycle."""
