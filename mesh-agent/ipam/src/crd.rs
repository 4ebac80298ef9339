//! The definitions of the custom resources, made from the types so that they cannot say anything else.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use crate::object::{GROUP, IpBlockSpec, IpPoolSpec, IpReservationSpec, VERSION};

/// The definitions, with the plural that names each.
pub fn definitions() -> Vec<(&'static str, Value)> {
    vec![
        (
            "ipblocks",
            definition::<IpBlockSpec>(
                "IPBlock",
                "ipblocks",
                "Some addresses of an IPPool, and which node has which. Written by the agents.",
                &[("CIDR", ".spec.cidr"), ("Node", ".spec.affinity")],
            ),
        ),
        (
            "ippools",
            definition::<IpPoolSpec>(
                "IPPool",
                "ippools",
                "A range of pod addresses, cut into blocks that nodes take as they need them.",
                &[("CIDR", ".spec.cidr"), ("Disabled", ".spec.disabled")],
            ),
        ),
        (
            "ipreservations",
            definition::<IpReservationSpec>(
                "IPReservation",
                "ipreservations",
                "Addresses that no pod gets.",
                &[("CIDRs", ".spec.reservedCIDRs[*]")],
            ),
        ),
    ]
}

fn definition<T: JsonSchema>(kind: &str, plural: &str, doc: &str, columns: &[(&str, &str)]) -> Value {
    let generator = SchemaSettings::openapi3().with(|settings| settings.inline_subschemas = true);
    let mut spec = generator.into_generator().into_root_schema_for::<T>().to_value();
    structural(&mut spec);
    let columns: Vec<Value> = columns
        .iter()
        .map(|(name, path)| json!({"name": name, "type": if *name == "Disabled" { "boolean" } else { "string" }, "jsonPath": path}))
        .chain([json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"})])
        .collect();
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.{GROUP}")},
        "spec": {
            "group": GROUP,
            "names": {
                "categories": ["margay"],
                "kind": kind,
                "listKind": format!("{kind}List"),
                "plural": plural,
                "singular": kind.to_lowercase(),
            },
            "scope": "Cluster",
            "versions": [{
                "name": VERSION,
                "served": true,
                "storage": true,
                "additionalPrinterColumns": columns,
                "schema": {"openAPIV3Schema": {
                    "description": doc,
                    "type": "object",
                    "required": ["spec"],
                    "properties": {"spec": spec},
                }},
            }],
        },
    })
}

/// What schemars writes and a structural schema may not have. Unknown fields are dropped by the API server, and
/// refused by our own decoder.
fn structural(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            map.remove("$schema");
            map.remove("title");
            if map.get("additionalProperties") == Some(&Value::Bool(false)) {
                map.remove("additionalProperties");
            }
            // The API server knows signed formats only.
            if map.get("format").is_some_and(|f| f.as_str().is_some_and(|f| f.starts_with("uint"))) {
                map.remove("format");
            }
            // Variants that are described one by one: their names only.
            if let Some(Value::Array(variants)) = map.remove("oneOf") {
                let names = variants.iter().flat_map(|variant| {
                    let listed = variant.get("enum").and_then(Value::as_array).into_iter().flatten();
                    listed.chain(variant.get("const")).cloned().collect::<Vec<_>>()
                });
                map.insert("enum".to_owned(), names.collect());
                map.insert("type".to_owned(), "string".into());
            }
            map.values_mut().for_each(structural);
        }
        Value::Array(list) => list.iter_mut().for_each(structural),
        _ => {}
    }
}
