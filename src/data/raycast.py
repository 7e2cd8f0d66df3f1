"""A small analytic ray caster: balls, cubes, cylinders, cones and capsules on a floor before a wall.

Legend: N rays. World axes: x right, y up, z away from the camera; lengths are in scene units (the floor is y = 0).
Everything is float32 numpy, without randomness: a picture is a pure function of its `View` and its `Body` list.
"""

from dataclasses import dataclass

import numpy as np

MISS = np.float32(1e9)
WALL_Z = 7.0
WALL_ID, FLOOR_ID, FIRST_BODY_ID = 0, 1, 2
LIGHT = np.array([-0.45, 0.80, -0.40], np.float32) / np.linalg.norm([-0.45, 0.80, -0.40]).astype(np.float32)


@dataclass(frozen=True)
class Body:
    """One primitive: `kind` in {ball, cube, cylinder, cone, capsule}.

    centre: middle of the base on the floor; for a ball its centre; for a capsule its first end.
    radius, height: in scene units. yaw: radians about y (cube). tip: second end of a capsule.
    """

    kind: str
    centre: tuple[float, float, float]
    radius: float
    colour: tuple[float, float, float]
    owner: int
    height: float = 0.0
    yaw: float = 0.0
    tip: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class View:
    """Camera at (x, height, 0); pitch > 0 looks down, yaw > 0 looks right (radians); fov is vertical (radians)."""

    x: float
    height: float
    pitch: float
    yaw: float
    fov: float = 0.87

    def axes(self) -> np.ndarray:
        """-> (3, 3): rows are the camera's right, up and forward directions in the world."""
        cp, sp, cy, sy = np.cos(self.pitch), np.sin(self.pitch), np.cos(self.yaw), np.sin(self.yaw)
        forward = np.array([sy * cp, -sp, cy * cp])
        right = np.array([cy, 0.0, -sy])
        return np.stack([right, np.cross(forward, right), forward]).astype(np.float32)

    def project(self, points: np.ndarray, size: int) -> np.ndarray:
        """(P, 3) world points -> (P, 3): pixel column u, pixel row v, depth along the optical axis."""
        rel = (points - np.array([self.x, self.height, 0.0])) @ self.axes().T
        focal = 0.5 * size / np.tan(0.5 * self.fov)
        u = rel[:, 0] / rel[:, 2] * focal + 0.5 * size
        v = -rel[:, 1] / rel[:, 2] * focal + 0.5 * size
        return np.stack([u, v, rel[:, 2]], 1).astype(np.float32)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1)


def _near_root(a, half_b, c):
    """Smaller root of a t^2 + 2 half_b t + c, `MISS` where there is none."""
    disc = half_b * half_b - a * c
    return np.where(disc > 0, (-half_b - np.sqrt(np.maximum(disc, 0))) / np.where(a == 0, 1e-9, a), MISS)


def _hit_ball(o, d, body):
    oc = o - np.array(body.centre, np.float32)
    t = _near_root(_dot(d, d), _dot(oc, d), _dot(oc, oc) - body.radius**2)
    return t, lambda p: (p - np.array(body.centre, np.float32)) / body.radius


def _spin(v, yaw):
    c, s = np.float32(np.cos(yaw)), np.float32(np.sin(yaw))
    return np.stack([c * v[..., 0] - s * v[..., 2], v[..., 1], s * v[..., 0] + c * v[..., 2]], -1)


def _hit_cube(o, d, body):
    half = np.float32(body.radius)
    centre = np.array(body.centre, np.float32) + np.array([0, half, 0], np.float32)
    lo, ld = _spin(o - centre, body.yaw), _spin(d, body.yaw)
    inv = 1.0 / np.where(np.abs(ld) < 1e-7, 1e-7, ld)
    t1, t2 = (-half - lo) * inv, (half - lo) * inv
    near, far = np.minimum(t1, t2).max(-1), np.maximum(t1, t2).min(-1)
    t = np.where((near < far) & (far > 0), near, MISS)

    def normal(p):
        local = _spin(p - centre, body.yaw)
        axis = np.abs(local).argmax(-1)
        n = np.zeros_like(local)
        np.put_along_axis(n, axis[:, None], np.sign(np.take_along_axis(local, axis[:, None], -1)), -1)
        return _spin(n, -body.yaw)

    return t, normal


def _round_side(o, d, body, slope):
    """Side of a cylinder (slope 0) or a cone (slope = radius / height), whose radius falls linearly to the top."""
    oc = o - np.array(body.centre, np.float32)
    r0 = body.radius - slope * oc[..., 1]
    a = d[..., 0] ** 2 + d[..., 2] ** 2 - (slope * d[..., 1]) ** 2
    half_b = oc[..., 0] * d[..., 0] + oc[..., 2] * d[..., 2] + slope * d[..., 1] * r0
    c = oc[..., 0] ** 2 + oc[..., 2] ** 2 - r0**2
    disc = half_b * half_b - a * c
    root = np.sqrt(np.maximum(disc, 0))
    safe = np.where(np.abs(a) < 1e-9, 1e-9, a)
    best = np.full(np.broadcast(a, c).shape, MISS, np.float32)
    for t in ((-half_b - root) / safe, (-half_b + root) / safe):
        y = oc[..., 1] + t * d[..., 1]
        best = np.minimum(best, np.where((disc > 0) & (t > 0) & (y >= 0) & (y <= body.height), t, MISS))
    return best


def _hit_cylinder(o, d, body):
    side = _round_side(o, d, body, np.float32(0))
    oc = o - np.array(body.centre, np.float32)
    t_cap = (body.height - oc[..., 1]) / np.where(np.abs(d[..., 1]) < 1e-7, 1e-7, d[..., 1])
    on_cap = (oc[..., 0] + t_cap * d[..., 0]) ** 2 + (oc[..., 2] + t_cap * d[..., 2]) ** 2 < body.radius**2
    cap = np.where(on_cap & (t_cap > 0), t_cap, MISS)

    def normal(p):
        rel = (p - np.array(body.centre, np.float32)) / body.radius
        top = rel[:, 1] * body.radius > body.height - 1e-3
        return np.where(top[:, None], np.array([0, 1, 0], np.float32), rel * np.array([1, 0, 1], np.float32))

    return np.minimum(side, cap), normal


def _hit_cone(o, d, body):
    slope = np.float32(body.radius / body.height)

    def normal(p):
        rel = p - np.array(body.centre, np.float32)
        rho = np.maximum(np.hypot(rel[:, 0], rel[:, 2]), 1e-6)
        n = np.stack([rel[:, 0] / rho, np.full_like(rho, slope), rel[:, 2] / rho], -1)
        return n / np.sqrt(1 + slope**2)

    return _round_side(o, d, body, slope), normal


def _hit_capsule(o, d, body):
    a, b = np.array(body.centre, np.float32), np.array(body.tip, np.float32)
    axis = b - a
    length2 = float(axis @ axis)
    oa = o - a
    bd, bo = d @ axis, oa @ axis
    t = _near_root(
        length2 * _dot(d, d) - bd**2,
        length2 * _dot(oa, d) - bo * bd,
        length2 * _dot(oa, oa) - bo**2 - body.radius**2 * length2,
    )
    y = bo + np.where(t < MISS, t, 0) * bd
    t = np.where((y > 0) & (y < length2), t, MISS)
    for end in (a, b):
        oe = o - end
        t = np.minimum(t, _near_root(_dot(d, d), _dot(oe, d), _dot(oe, oe) - body.radius**2))

    def normal(p):
        h = np.clip(((p - a) @ axis) / length2, 0, 1)
        return (p - a - h[:, None] * axis) / body.radius

    return t, normal


_HIT = {"ball": _hit_ball, "cube": _hit_cube, "cylinder": _hit_cylinder, "cone": _hit_cone, "capsule": _hit_capsule}


def _window(view: View, body: Body, size: int) -> tuple[slice, slice]:
    """Rows and columns of the (size, size) ray grid that can see the body: most rays of a picture miss it."""
    ends = np.array([body.centre, body.tip or body.centre], np.float32)
    pad = body.radius * 1.5 + (0 if body.tip else body.height)
    corners = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], np.float32) * pad
    uvz = view.project((ends[:, None] + corners).reshape(-1, 3), size)
    if uvz[:, 2].min() < 0.1:
        return slice(0, size), slice(0, size)
    lo, hi = np.floor(uvz[:, :2].min(0)), np.ceil(uvz[:, :2].max(0)) + 1
    lo, hi = np.clip(lo, 0, size).astype(int), np.clip(hi, 0, size).astype(int)
    return slice(lo[1], hi[1]), slice(lo[0], hi[0])


def _shade(point, normal, albedo, to_eye, lit, glossy):
    """Lambert with ambient light, hard shadow and, on bodies, a small highlight. -> (N, 3) in [0, 1]."""
    diffuse = np.maximum(normal @ LIGHT, 0) * lit
    colour = albedo * (0.42 + 0.62 * diffuse)[:, None]
    half = LIGHT + to_eye
    half = half / np.linalg.norm(half, axis=-1, keepdims=True)
    gloss = glossy * lit * np.maximum(_dot(normal, half), 0) ** 40 * 0.35
    return np.clip(colour + gloss[:, None], 0, 1)


def cast(view: View, bodies: list[Body], floor_rgb, wall_rgb, size: int, oversample: int = 2) -> dict[str, np.ndarray]:
    """Render one picture.

    size: side in pixels; oversample: rays per pixel side (box filter).
    Returns rgb (size, size, 3) float32 in [0, 1], depth (size, size) along the optical axis in scene units, and
    owner (size, size) int: 0 wall, 1 floor, `Body.owner` otherwise (both from the ray nearest the pixel's middle).
    """
    n = size * oversample
    focal = 0.5 * n / np.tan(0.5 * view.fov)
    ticks = (np.arange(n, dtype=np.float32) + 0.5 - 0.5 * n) / np.float32(focal)
    axes = view.axes()
    cam = np.stack(np.broadcast_arrays(ticks[None, :], -ticks[:, None], np.float32(1)), -1)
    d = (cam @ axes).astype(np.float32)  # (n, n, 3); depth along the axis equals t, since the axis component is 1
    o = np.array([view.x, view.height, 0], np.float32)

    t_floor = np.where(d[..., 1] < -1e-6, -o[1] / np.minimum(d[..., 1], -1e-6), MISS)
    t_wall = (WALL_Z - o[2]) / np.maximum(d[..., 2], 1e-6)
    on_floor = t_floor < t_wall
    t = np.where(on_floor, t_floor, t_wall).astype(np.float32)
    which = np.full((n, n), -1, np.int32)
    normals = []
    for k, body in enumerate(bodies):
        rows, cols = _window(view, body, n)
        hit, normal = _HIT[body.kind](o, d[rows, cols], body)
        normals.append(normal)
        closer = (hit > 0) & (hit < t[rows, cols])
        t[rows, cols] = np.where(closer, hit, t[rows, cols])
        which[rows, cols] = np.where(closer, k, which[rows, cols])

    flat_d, flat_t, flat_which = d.reshape(-1, 3), t.reshape(-1), which.reshape(-1)
    point = o + flat_d * flat_t[:, None]
    normal = np.where(on_floor.reshape(-1, 1), np.float32([0, 1, 0]), np.float32([0, 0, -1]))
    albedo = np.where(on_floor.reshape(-1, 1), np.float32(floor_rgb), np.float32(wall_rgb))
    for k, body in enumerate(bodies):
        mine = flat_which == k
        if mine.any():
            normal[mine] = normals[k](point[mine])
            albedo[mine] = body.colour
    lit = _lit(point, normal, bodies)
    rgb = _shade(point, normal, albedo, -flat_d / np.linalg.norm(flat_d, axis=-1, keepdims=True), lit, flat_which >= 0)

    owner_of = np.array([b.owner for b in bodies] + [WALL_ID], np.int32)
    owner = np.where(which >= 0, owner_of[which], np.where(on_floor, FLOOR_ID, WALL_ID))
    mid = oversample // 2
    return {
        "rgb": rgb.reshape(size, oversample, size, oversample, 3).mean((1, 3)).astype(np.float32),
        "depth": t[mid::oversample, mid::oversample].astype(np.float32),
        "owner": owner[mid::oversample, mid::oversample],
    }


def _lit(point: np.ndarray, normal: np.ndarray, bodies: list[Body]) -> np.ndarray:
    """(N,) 1 where the light reaches the point, 0 in shadow. Only points near a body's shadow line are traced."""
    lit = np.ones(len(point), np.float32)
    start = point + normal * 2e-3
    for body in bodies:
        mid = (np.array(body.centre) + np.array(body.tip or (body.centre[0], body.centre[1] + body.height, body.centre[2]))) / 2
        reach = body.radius * 1.8 + body.height / 2 + (np.linalg.norm(mid - np.array(body.centre)) if body.tip else 0)
        rel = np.float32(mid) - start
        along = rel @ LIGHT
        near = (_dot(rel, rel) - along**2 < reach**2) & (along > -reach)
        if near.any():
            hit, _ = _HIT[body.kind](start[near], LIGHT[None], body)
            lit[near] *= ~((hit > 0) & (hit < MISS))
    return lit
