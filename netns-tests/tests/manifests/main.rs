//! What an operator applies, on the real API server.
#![allow(unreachable_pub)] // One binary.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "../common/mod.rs"]
mod common;

mod admission;
mod blocks;
mod container;
mod image;
mod overlays;
mod pods;
mod rights;
mod support;
