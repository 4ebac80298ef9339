//! The committed reference and resource definition say what the code says.
//! `MARGAY_UPDATE=1 cargo test -p mesh-agent --test reference` writes them anew.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use mesh_agent::config::reference::{configuration_md, crds};

fn same_as_committed(path: &str, generated: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    if std::env::var_os("MARGAY_UPDATE").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, generated).unwrap();
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == generated, "{} is out of date: run with MARGAY_UPDATE=1", path.display());
}

#[test]
fn the_committed_configuration_reference_is_the_codes() {
    same_as_committed("docs/configuration.md", &configuration_md());
}

#[test]
fn the_committed_resource_definition_is_the_codes() {
    for (file, text) in crds().unwrap() {
        same_as_committed(&format!("manifests/crds/{file}"), &text);
    }
}

#[test]
fn the_resource_definition_is_one_an_api_server_takes() {
    for (file, text) in crds().unwrap() {
        let crd: serde_json::Value = serde_saphyr::from_str(&text).unwrap();
        assert_eq!(crd["spec"]["scope"], "Cluster");
        let name = crd["metadata"]["name"].as_str().unwrap();
        assert_eq!(file, format!("margay.io_{}.yaml", name.strip_suffix(".margay.io").unwrap()));
        structural(&crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"], "");
    }
}

/// The rules of structural schemas: no `additionalProperties: false`, no references, a type for each field.
fn structural(schema: &serde_json::Value, path: &str) {
    let Some(fields) = schema.as_object() else { return };
    assert!(!fields.contains_key("$ref"), "{path}");
    assert!(fields.get("additionalProperties").is_none_or(|value| value != false), "{path}");
    assert!(
        fields.contains_key("type") || fields.contains_key("x-kubernetes-preserve-unknown-fields"),
        "{path}"
    );
    for (name, property) in fields.get("properties").and_then(|p| p.as_object()).into_iter().flatten() {
        structural(property, &format!("{path}.{name}"));
    }
    if let Some(items) = fields.get("items") {
        structural(items, &format!("{path}[]"));
    }
}
