//! `mesh-lab conformance`: reachability cases replayed on real pods over the real mesh.

pub mod case;
pub mod plan;
pub mod report;
pub mod run;
