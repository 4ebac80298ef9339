//! The committed resource definitions say what the code says.
//! `MARGAY_UPDATE=1 cargo test -p mesh-ipam --test crds` writes them anew.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::Path;

use mesh_ipam::crd::definitions;
use mesh_ipam::object::IpPoolSpec;
use serde_json::{Value, json};

#[test]
fn the_committed_resource_definitions_are_the_codes() {
    for (plural, definition) in definitions() {
        let generated =
            format!("# Generated from the Rust types.\n{}", serde_saphyr::to_string(&definition).unwrap());
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(format!("../../manifests/components/ipam/margay.io_{plural}.yaml"));
        if std::env::var_os("MARGAY_UPDATE").is_some() {
            fs::write(&path, &generated).unwrap();
        }
        let committed = fs::read_to_string(&path).unwrap_or_default();
        assert!(committed == generated, "{} is out of date: run with MARGAY_UPDATE=1", path.display());
        let read: Value = serde_saphyr::from_str(&committed).unwrap();
        assert_eq!(read, definition);
    }
}

#[test]
fn the_resource_definitions_are_such_as_an_api_server_takes() {
    for (plural, definition) in definitions() {
        assert_eq!(definition["spec"]["scope"], "Cluster");
        assert_eq!(definition["metadata"]["name"], format!("{plural}.margay.io"));
        structural(&definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"], plural);
    }
}

/// The rules of structural schemas: no `additionalProperties: false`, no references, a type for each field.
fn structural(schema: &Value, path: &str) {
    let fields = schema.as_object().unwrap();
    for foreign in ["$ref", "$schema", "$defs", "definitions", "oneOf", "anyOf", "allOf", "const"] {
        assert!(!fields.contains_key(foreign), "{path}: {foreign}");
    }
    assert!(fields.get("type").is_some_and(Value::is_string), "{path}: {schema}");
    if let Some(format) = fields.get("format").and_then(Value::as_str) {
        assert!(["int32", "int64", "cidr"].contains(&format), "{path}: {format}");
    }
    for (name, property) in fields.get("properties").and_then(Value::as_object).into_iter().flatten() {
        structural(property, &format!("{path}.{name}"));
    }
    for nested in ["items", "additionalProperties"] {
        if let Some(nested) = fields.get(nested) {
            structural(nested, &format!("{path}[]"));
        }
    }
}

#[test]
fn a_pool_has_its_defaults() {
    let pool: IpPoolSpec = serde_json::from_value(json!({"cidr": "10.0.0.0/16"})).unwrap();
    assert!(pool.allow_borrowing && !pool.disabled && pool.block_size.is_none());
    let written = serde_json::to_value(&pool).unwrap();
    assert_eq!(serde_json::from_value::<IpPoolSpec>(written).unwrap(), pool);
}
