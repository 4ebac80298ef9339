//! The committed BPF object and what it says of its maps.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::error::Error;

/// ELF wants its headers aligned; `include_bytes!` alone promises one byte.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!("../object/margay.bpf.o"));

/// The names of the programs for devices.
pub(crate) const PROGRAMS: [&str; 5] =
    ["pod_egress", "pod_ingress", "tunnel_ingress", "exit_ethernet", "exit_ip"];
/// The name of the program for the host's sockets.
pub(crate) const HOST: &str = "host_ingress";

/// The object's bytes: the committed ones, unless `MARGAY_BPF_OBJECT` names a file (for comparing tool chains).
pub(crate) fn bytes() -> Result<Cow<'static, [u8]>, Error> {
    match std::env::var_os("MARGAY_BPF_OBJECT") {
        None => Ok(Cow::Borrowed(&OBJECT.0)),
        Some(path) => {
            let path = PathBuf::from(path);
            std::fs::read(&path).map(Cow::Owned).map_err(|source| Error::io("read", path, source))
        }
    }
}

/// What a pinned map must agree with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MapSpec {
    /// `enum bpf_map_type`.
    pub(crate) kind: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) flags: u32,
}

/// The maps that the object declares, by name.
pub(crate) fn maps(object: &[u8]) -> Result<BTreeMap<String, MapSpec>, Error> {
    let object = aya_obj::Object::parse(object).map_err(|source| Error::Object(source.to_string()))?;
    let specs = object.maps.iter().map(|(name, map)| {
        let spec = MapSpec {
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: map.max_entries(),
            flags: map.map_flags(),
        };
        (name.clone(), spec)
    });
    Ok(specs.collect())
}
