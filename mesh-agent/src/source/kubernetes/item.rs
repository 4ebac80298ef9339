//! One object as it comes from the API server, decoded while it is parsed: nothing of it is kept that the snapshot
//! does not need.

use std::borrow::Cow;
use std::marker::PhantomData;

use kube::Resource;
use kube::api::ObjectMeta;
use kube::core::ClusterResourceScope;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::source::decode::{Decoded, Kind, decode_served};

/// A kind of object that is watched.
pub(super) trait Watched: Send + Sync + Clone + std::fmt::Debug + 'static {
    /// Which.
    const KIND: Kind;
}

macro_rules! watched {
    ($($name:ident)*) => {$(
        #[doc = concat!("Watched ", stringify!($name), "s.")]
        #[derive(Debug, Clone)]
        pub(super) struct $name;
        impl Watched for $name {
            const KIND: Kind = Kind::$name;
        }
    )*};
}
watched!(MeshConfiguration Node Namespace Pod Service NetworkPolicy IpPool IpReservation IpBlock);

/// An object of kind `W`.
#[derive(Debug, Clone)]
pub(super) struct Item<W> {
    /// Name, namespace and resource version: what a watch needs to know.
    meta: ObjectMeta,
    /// What the snapshot needs of it.
    pub(super) decoded: Decoded,
    kind: PhantomData<W>,
}

impl<'de, W: Watched> Deserialize<'de> for Item<W> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let text = |field: &str| {
            let found = value.pointer(field).and_then(Value::as_str);
            found.filter(|text| !text.is_empty()).map(str::to_owned)
        };
        let meta = ObjectMeta {
            name: text("/metadata/name"),
            namespace: text("/metadata/namespace"),
            resource_version: text("/metadata/resourceVersion"),
            ..ObjectMeta::default()
        };
        if meta.name.is_none() {
            return Err(D::Error::custom("an object without a name"));
        }
        Ok(Self { meta, decoded: decode_served(W::KIND, &value), kind: PhantomData })
    }
}

impl<W: Watched> Resource for Item<W> {
    type DynamicType = ();
    // All namespaces at once, always.
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        W::KIND.name().into()
    }

    fn group((): &()) -> Cow<'_, str> {
        W::KIND.api_version().rsplit_once('/').map_or("", |(group, _)| group).into()
    }

    fn version((): &()) -> Cow<'_, str> {
        let version = W::KIND.api_version();
        version.rsplit_once('/').map_or(version, |(_, version)| version).into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        W::KIND.plural().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn paths_are_those_of_the_api() {
        assert_eq!(Item::<Node>::url_path(&(), None), "/api/v1/nodes");
        let mesh = Item::<MeshConfiguration>::url_path(&(), None);
        assert_eq!(mesh, "/apis/margay.io/v1alpha1/meshconfigurations");
        let policies = Item::<NetworkPolicy>::url_path(&(), None);
        assert_eq!(policies, "/apis/networking.k8s.io/v1/networkpolicies");
    }

    #[test]
    fn an_item_of_a_list_has_no_kind_and_is_one_all_the_same() {
        let text = r#"{"metadata": {"name": "a", "namespace": "x", "resourceVersion": "7"}, "spec": {"nodeName": "n", "containers": []}}"#;
        let item: Item<Pod> = serde_json::from_str(text).unwrap();
        assert_eq!(item.meta().resource_version.as_deref(), Some("7"));
        assert_eq!(item.decoded.key.to_string(), "Pod/x/a");
        assert!(item.decoded.problems.0.is_empty(), "{:?}", item.decoded.problems);
    }
}
