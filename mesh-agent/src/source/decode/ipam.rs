//! IPPool, IPReservation and IPBlock. Pools are judged together, once all are known: here they are only read.

use k8s_openapi::jiff::Timestamp;
use mesh_ipam::block::Block;
use mesh_ipam::catalogue;
use serde_json::Value;

use super::problem::Problems;
use crate::snapshot::ipam::BlockView;

/// A pool or a reservation as it was written.
pub fn catalogued(name: &str, value: &Value) -> catalogue::Object {
    let created = value.pointer("/metadata/creationTimestamp").and_then(Value::as_str);
    let created = created.and_then(|text| text.parse::<Timestamp>().ok()).map_or(0, Timestamp::as_second);
    let spec = value.get("spec").cloned().unwrap_or_default();
    catalogue::Object { name: name.to_owned(), created, spec }
}

/// A block; one that cannot be read is refused.
pub fn block(name: &str, value: &Value, problems: &mut Problems) -> Option<(ipnet::IpNet, BlockView)> {
    match Block::decode(name, value.get("spec").unwrap_or(&Value::Null)) {
        Ok(block) => Some((block.cidr, BlockView::from(&block))),
        Err(issue) => {
            problems.invalid(issue.field, issue.message);
            None
        }
    }
}
