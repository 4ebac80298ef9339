//! What the agent says to an API server. What it hears from one is [`crate::source::kubernetes`].

pub mod announce;
pub mod blocks;
pub mod client;
pub mod condition;
pub mod events;
pub mod node_status;
mod write;

use crate::snapshot::Snapshot;

/// The one who owns the annotations.
pub const MANAGER: &str = "margay-agent";
/// The one who owns the condition and the MeshNodeStatus.
pub const STATUS_MANAGER: &str = "margay-agent-status";

/// This node's Node object as it was last seen: its name and, as it should be there, its UID. A write with a UID changes
/// that very object, and never makes one.
fn own_node(snapshot: &Snapshot) -> Option<(&str, &str)> {
    let name = snapshot.local.node_name.as_str();
    let uid = snapshot.cluster.nodes.get(name)?.uid.as_deref()?;
    Some((name, uid))
}
