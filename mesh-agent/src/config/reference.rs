//! The custom resource's definition and the configuration reference, made from the types.

use kube::CustomResourceExt;

use super::mesh::MeshConfiguration;

/// `manifests/crds/margay.io_meshconfigurations.yaml`.
pub fn crd_yaml() -> Result<String, serde_saphyr::SerializeError> {
    serde_saphyr::to_string(&MeshConfiguration::crd())
}
