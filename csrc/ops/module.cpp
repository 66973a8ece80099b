// The Python module detr_fast._C. Importing it loads the library, which runs the registrations of all ops.
#include <Python.h>

#include "../kernels.h"

namespace {

PyObject* instruction_set(PyObject*, PyObject*) { return PyUnicode_FromString(detr::cpu::kernels().name); }

PyObject* use_instruction_set(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const bool known = detr::cpu::use_instruction_set(PyBytes_AsString(bytes));
  Py_DECREF(bytes);
  return PyBool_FromLong(known);
}

PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "Name of the instruction set whose kernels run."},
    {"use_instruction_set", use_instruction_set, METH_O,
     "Chooses one by name, for tests; False if it is not available."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
