//! Policies to compact rules.

use crate::model::{ClusterView, LocalEndpoint, Ranges};

/// What the maps are to hold, and the names behind every id in them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Compiled {}

/// Compiles the cluster's policies for this node's endpoints. Pure and total: what is invalid is compiled closed.
pub fn compile(view: &ClusterView, local: &[LocalEndpoint], ranges: &Ranges) -> Compiled {
    let _ = (view, local, ranges);
    Compiled {}
}
