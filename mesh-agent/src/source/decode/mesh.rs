//! MeshConfiguration.

use super::problem::Problems;
use crate::config::mesh::{MeshConfiguration, MeshConfigurationSpec, NAME};

/// The object's `spec`, checked. Unlike in other kinds a field nobody knows refuses the object: it would be
/// a wish for the whole mesh that nobody carries out.
pub fn decode(object: MeshConfiguration, problems: &mut Problems) -> Option<MeshConfigurationSpec> {
    problems.refuse_unknown("");
    let name = object.metadata.name.as_deref().unwrap_or_default();
    if name != NAME {
        problems.refuse(
            "metadata.name",
            "NotTheDefault",
            format!("there is one MeshConfiguration, named {NAME:?}; {name:?} has no effect"),
        );
        return None;
    }
    for (field, message) in object.spec.check() {
        problems.invalid(format!("spec.{field}"), message);
    }
    Some(object.spec)
}
