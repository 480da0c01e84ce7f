"""Standard units of vital signs and laboratory tests, and how other units convert to them.

A conversion is ``standard = value * factor + offset``. Units are compared without case and blanks. Laboratory factors
are the conventional-to-SI factors that laboratories publish (molar masses); the standard units are those of the SDTM
data the platform ships with.

Vital signs (SDTM VSTESTCD -> standard unit): SYSBP, DIABP mmHg; PULSE, HR beats/min; RESP breaths/min; TEMP C;
OXYSAT %; WEIGHT kg; HEIGHT cm; BMI kg/m2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class UnitRule:
    """The standard unit of a test and the units that convert to it: normalised name -> (factor, offset)."""

    standard: str
    convert: dict[str, tuple[float, float]]


@lru_cache(maxsize=65536)
def normalise_unit(unit: str) -> str:
    """Return the unit as it is compared: upper case, no blanks, one spelling of micro, degree and times-ten."""
    text = unit.upper().replace(" ", "")
    # the micro sign and the Greek letter share a glyph, and both have the same upper case form as no ASCII letter
    text = text.replace("\u00b5", "U").replace("\u039c", "U").replace("\u00b0", "").replace("\u00b2", "2")
    return re.sub(r"^(?:X?10[\^*E]|X10)([0-9]+)", r"10^\1", text)


def _rules(standard: str, units: dict[str, float | tuple[float, float]]) -> UnitRule:
    convert = {normalise_unit(standard): (1.0, 0.0)}
    for name, factor in units.items():
        convert[normalise_unit(name)] = factor if isinstance(factor, tuple) else (float(factor), 0.0)
    return UnitRule(standard, convert)


_PRESSURE = _rules("mmHg", {"MM HG": 1, "KPA": 7.500616827})
_RATE = _rules("beats/min", {"/MIN": 1, "1/MIN": 1, "BPM": 1, "BEATS PER MINUTE": 1, "{BEATS}/MIN": 1, "MIN-1": 1})

_FAHRENHEIT = (5 / 9, -160 / 9)

VITAL_UNITS: dict[str, UnitRule] = {
    "SYSBP": _PRESSURE,
    "DIABP": _PRESSURE,
    "PULSE": _RATE,
    "HR": _RATE,
    "RESP": _rules("breaths/min", {"/MIN": 1, "1/MIN": 1, "BREATHS PER MINUTE": 1, "{BREATHS}/MIN": 1, "BRPM": 1}),
    "TEMP": _rules(
        "C",
        {
            "CEL": 1, "DEGC": 1, "CELSIUS": 1, "K": (1, -273.15),
            "F": _FAHRENHEIT, "DEGF": _FAHRENHEIT, "[DEGF]": _FAHRENHEIT, "FAHRENHEIT": _FAHRENHEIT,
        },
    ),
    "OXYSAT": _rules("%", {"PERCENT": 1, "FRACTION": 100, "1": 100}),
    "WEIGHT": _rules("kg", {"LB": 0.45359237, "LBS": 0.45359237, "[LB_AV]": 0.45359237, "G": 0.001}),
    "HEIGHT": _rules("cm", {"IN": 2.54, "INCH": 2.54, "INCHES": 2.54, "[IN_I]": 2.54, "M": 100, "MM": 0.1}),
    "BMI": _rules("kg/m2", {"KG/M^2": 1}),
}  # fmt: skip

_ENZYME: dict[str, float | tuple[float, float]] = {"IU/L": 1, "UKAT/L": 60.0, "U/ML": 1000}
_COUNT: dict[str, float | tuple[float, float]] = {
    "10^9/L": 1, "G/L": 1, "10^3/UL": 1, "K/UL": 1, "10^6/ML": 1, "THOU/UL": 1, "THOU/MCL": 1, "10^3/MCL": 1,
    "10^3/MM3": 1, "/UL": 0.001, "/MM3": 0.001, "CELLS/UL": 0.001,
}  # fmt: skip
_FRACTION: dict[str, float | tuple[float, float]] = {"%": 0.01, "FRACTION": 1, "RATIO": 1, "L/L": 1}

LAB_UNITS: dict[str, UnitRule] = {
    "ALB": _rules("g/L", {"G/DL": 10}),
    "PROT": _rules("g/L", {"G/DL": 10}),
    "ALP": _rules("U/L", _ENZYME),
    "ALT": _rules("U/L", _ENZYME),
    "AST": _rules("U/L", _ENZYME),
    "CK": _rules("U/L", _ENZYME),
    "GGT": _rules("U/L", _ENZYME),
    "LDH": _rules("U/L", _ENZYME),
    "BILI": _rules("umol/L", {"MG/DL": 17.1}),
    "CREAT": _rules("umol/L", {"MG/DL": 88.4}),
    "URATE": _rules("umol/L", {"MG/DL": 59.48}),
    "BUN": _rules("mmol/L", {"MG/DL": 0.357}),
    "CA": _rules("mmol/L", {"MG/DL": 0.2495, "MEQ/L": 0.5}),
    "CHOL": _rules("mmol/L", {"MG/DL": 0.02586}),
    "TRIG": _rules("mmol/L", {"MG/DL": 0.01129}),
    "GLUC": _rules("mmol/L", {"MG/DL": 0.05551}),
    "PHOS": _rules("mmol/L", {"MG/DL": 0.3229}),
    "MG": _rules("mmol/L", {"MG/DL": 0.4114, "MEQ/L": 0.5}),
    "LACTATE": _rules("mmol/L", {"MG/DL": 0.111, "MEQ/L": 1}),
    "K": _rules("mmol/L", {"MEQ/L": 1}),
    "CL": _rules("mmol/L", {"MEQ/L": 1}),
    "SODIUM": _rules("mmol/L", {"MEQ/L": 1}),
    "BICARB": _rules("mmol/L", {"MEQ/L": 1}),
    "HGB": _rules("mmol/L", {"G/DL": 0.6206, "G/L": 0.06206}),
    "MCHC": _rules("mmol/L", {"G/DL": 0.6206, "G/L": 0.06206}),
    "MCH": _rules("fmol(Fe)", {"PG": 0.06206, "FMOL": 1}),
    "MCV": _rules("fL", {"UM3": 1}),
    "HCT": _rules("1", _FRACTION),
    "HBA1C": _rules("1", _FRACTION),
    "PLAT": _rules("GI/L", _COUNT),
    "WBC": _rules("GI/L", _COUNT),
    "BASO": _rules("GI/L", _COUNT),
    "EOS": _rules("GI/L", _COUNT),
    "LYM": _rules("GI/L", _COUNT),
    "MONO": _rules("GI/L", _COUNT),
    "NEUT": _rules("GI/L", _COUNT),
    "RBC": _rules("TI/L", {"10^12/L": 1, "T/L": 1, "10^6/UL": 1, "M/UL": 1, "10^6/MCL": 1, "10^6/MM3": 1}),
    "CRP": _rules("mg/L", {"MG/DL": 10, "UG/ML": 1}),
    "TSH": _rules("mU/L", {"UIU/ML": 1, "UU/ML": 1, "MIU/L": 1}),
    "VITB12": _rules("pmol/L", {"PG/ML": 0.7378, "NG/L": 0.7378}),
}  # fmt: skip

LAB_NAMES: dict[str, str] = {
    "albumin": "ALB", "total protein": "PROT", "protein": "PROT", "alkaline phosphatase": "ALP",
    "alanine aminotransferase": "ALT", "sgpt": "ALT", "aspartate aminotransferase": "AST", "sgot": "AST",
    "creatine kinase": "CK", "cpk": "CK", "gamma glutamyl transferase": "GGT", "lactate dehydrogenase": "LDH",
    "bilirubin": "BILI", "total bilirubin": "BILI", "creatinine": "CREAT", "serum creatinine": "CREAT",
    "urate": "URATE", "uric acid": "URATE", "blood urea nitrogen": "BUN", "urea nitrogen": "BUN", "calcium": "CA",
    "cholesterol": "CHOL", "total cholesterol": "CHOL", "triglycerides": "TRIG", "glucose": "GLUC",
    "blood glucose": "GLUC", "phosphate": "PHOS", "phosphorus": "PHOS", "magnesium": "MG", "lactate": "LACTATE",
    "lactic acid": "LACTATE", "potassium": "K", "chloride": "CL", "sodium": "SODIUM", "na": "SODIUM",
    "bicarbonate": "BICARB", "hemoglobin": "HGB", "haemoglobin": "HGB", "hb": "HGB", "hematocrit": "HCT",
    "haematocrit": "HCT", "hemoglobin a1c": "HBA1C", "a1c": "HBA1C", "platelets": "PLAT", "platelet": "PLAT",
    "platelet count": "PLAT", "plt": "PLAT", "leukocytes": "WBC", "white blood cells": "WBC",
    "white blood cell count": "WBC", "wbc count": "WBC", "basophils": "BASO", "eosinophils": "EOS",
    "lymphocytes": "LYM", "monocytes": "MONO", "neutrophils": "NEUT", "erythrocytes": "RBC", "red blood cells": "RBC",
    "red blood cell count": "RBC", "c reactive protein": "CRP", "thyrotropin": "TSH", "vitamin b12": "VITB12",
}  # fmt: skip


@lru_cache(maxsize=4096)
def lab_test_code(test_name: str) -> str:
    """Return the SDTM test code of a lab test's name or code: ``"Hemoglobin"`` -> ``"HGB"``, ``"alt"`` -> ``"ALT"``.

    A name that is not known becomes its own code: upper case, words joined by ``_``.
    """
    words = re.sub(r"[\s_\-]+", " ", test_name.strip()).lower()
    return LAB_NAMES.get(words) or words.upper().replace(" ", "_")


def conversion(rule: UnitRule | None, unit: str) -> tuple[float, float] | None:
    """Return (factor, offset) from `unit` to the rule's standard unit; None where there is no rule or no such unit."""
    return None if rule is None else rule.convert.get(normalise_unit(unit))


def convert(value: float, factors: tuple[float, float]) -> float:
    """Apply (factor, offset). A converted value is rounded to six decimals: the noise of binary fractions goes."""
    factor, offset = factors
    return value if factor == 1.0 and offset == 0.0 else round(value * factor + offset, 6)
